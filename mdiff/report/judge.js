"use strict";
(() => {
  const known = JSON.parse(document.getElementById("known").textContent);
  const pairs = [...document.querySelectorAll("ol > li")];
  const form = document.getElementById("form");
  const name = document.getElementById("judge");
  const place = `mdiff-judge-${known.sheet}`;
  const keys = { y: "yes", n: "no", u: "unsure" };
  let here = -1;

  const answer = (i) => form.elements[`p${i + 1}`].value || null;
  const answers = () => pairs.map((_, i) => answer(i));
  const text = () => JSON.stringify({ ...known, judge: name.value.trim(), answers: answers() });

  function keep() {
    const said = answers();
    const done = said.filter((a) => a !== null).length;
    pairs.forEach((li, i) => li.classList.toggle("done", said[i] !== null));
    document.getElementById("count").textContent = `${done} of ${pairs.length} answered`;
    document.getElementById("progress").value = done;
    document.getElementById("text").value = text();
    let note = "Answers are kept in this browser until you start over.";
    try {
      localStorage.setItem(place, text());
    } catch {
      note = "This browser does not let the page keep answers: save them before you close it.";
    }
    document.getElementById("kept").textContent = note;
  }

  function restore() {
    let stored = null;
    try {
      stored = JSON.parse(localStorage.getItem(place));
    } catch {
      return;
    }
    if (!stored || !Array.isArray(stored.answers) || stored.answers.length !== pairs.length) return;
    name.value = stored.judge || "";
    stored.answers.forEach((a, i) => {
      if (a !== null) form.elements[`p${i + 1}`].value = a;
    });
  }

  function go(i, scroll = true) {
    here = Math.max(0, Math.min(pairs.length - 1, i));
    pairs[here].focus({ preventScroll: true });
    if (scroll) pairs[here].scrollIntoView({ block: "center" });
  }

  document.addEventListener("keydown", (event) => {
    const typing = event.target === name || event.target.id === "text";
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const key = event.key.toLowerCase();
    if (keys[key]) {
      if (here < 0) return go(0);
      form.elements[`p${here + 1}`].value = keys[key];
      keep();
      go(here + 1);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      go(here < 0 ? 0 : here + (event.key === "ArrowDown" ? 1 : -1));
    } else if (event.key === "Backspace" && here >= 0) {
      form.querySelectorAll(`[name=p${here + 1}]`).forEach((box) => { box.checked = false; });
      keep();
    } else return;
    event.preventDefault();
  });

  pairs.forEach((li, i) => li.addEventListener("focusin", () => { here = i; }));
  form.addEventListener("change", keep);
  name.addEventListener("input", keep);
  form.addEventListener("submit", (event) => event.preventDefault());

  document.getElementById("save").addEventListener("click", () => {
    const missing = answers().filter((a) => a === null).length;
    if (missing && !confirm(`${missing} pairs are not answered. Save anyway?`)) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${text()}\n`], { type: "application/json" }));
    const who = name.value.trim().replace(/[^\w-]+/g, "-") || "judge";
    link.download = `answers-${who}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  document.getElementById("clear").addEventListener("click", () => {
    if (!confirm("Clear all answers on this page?")) return;
    form.querySelectorAll("input[type=radio]").forEach((box) => { box.checked = false; });
    keep();
  });

  restore();
  keep();
  const open = answers().indexOf(null);
  if (open > 0) go(open);
})();
