"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, fields = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), fields);
    node.append(...children);
    return node;
  };
  all("[data-js]").forEach((node) => { node.hidden = false; });

  // Tables: a click on a header sorts up, then down, then as written.
  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    const groups = table.tBodies.length > 1;
    const parent = groups ? table : table.tBodies[0];
    const written = groups ? [...table.tBodies] : [...parent.rows];
    const cell = (row, i) => (groups ? row.rows[0] : row).cells[i];
    const value = (row, i) => {
      const found = cell(row, i);
      if (!found) return null;
      if ("sort" in found.dataset) return found.dataset.sort === "" ? null : Number(found.dataset.sort);
      return found.textContent.trim();
    };
    const order = (a, b) => (typeof a === "number" && typeof b === "number"
      ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
    heads.forEach((head, i) => {
      if (!head.textContent.trim()) return;
      const button = make("button", { type: "button", className: "sort", title: "Sort" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = { none: "ascending", ascending: "descending", descending: "none" };
        const to = next[head.getAttribute("aria-sort") || "none"];
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (to !== "none") head.setAttribute("aria-sort", to);
        const sign = to === "descending" ? -1 : 1;
        const rows = to === "none" ? written : [...written].sort((a, b) => {
          const [x, y] = [value(a, i), value(b, i)];
          if (x === null || y === null) return (x === null) - (y === null); // absent ones stay last
          return sign * order(x, y);
        });
        rows.forEach((row) => parent.append(row));
      });
    });
  }

  // Sliders: every number and text was made with the page; moving one only picks another.
  for (const box of all("[data-slider]")) {
    const slider = data.sliders[box.dataset.slider];
    const input = box.querySelector("input");
    const marks = Object.fromEntries(all("[data-marks]").map((node) => [node.dataset.marks, node]));
    const show = () => {
      const k = Number(input.value);
      box.querySelector("output").textContent = slider.text[k];
      input.setAttribute("aria-valuetext", slider.text[k]);
      all("tbody tr", box).forEach((tr, r) => {
        slider.rows[r].cells.forEach((texts, c) => { tr.cells[c + 2].textContent = texts[k] || "–"; });
      });
      for (const name of new Set(slider.rows.flatMap((row) => Object.keys(row.marks)))) {
        const plot = marks[name];
        if (!plot) continue;
        const { box: [left, right, bottom, top], x, y } = JSON.parse(plot.dataset.place);
        const at = (v, ends, low, high) => 100 * (low + (high - low) * (v - ends[0]) / (ends[1] - ends[0]));
        all(".mark, .dot", plot).forEach((old) => old.remove());
        const across = at(slider.at[k], x, left, right);
        const line = make("span", { className: "mark" });
        line.style.cssText = `left:${across}%;top:${100 * (1 - top)}%;height:${100 * (top - bottom)}%`;
        plot.append(line);
        slider.rows.forEach((row) => {
          const v = (row.marks[name] || [])[k];
          if (v === null || v === undefined) return;
          const dot = make("span", { className: row.side.startsWith("held") ? "dot open" : "dot" });
          dot.style.cssText = `left:${across}%;top:${100 - at(v, y, bottom, top)}%;--c:${data.runs[row.run].color}`;
          plot.append(dot);
        });
      }
    };
    input.addEventListener("input", show);
    show();
  }

  // The gallery: all generations of a run, filtered and sorted; pictures where the audit stored them.
  const form = document.getElementById("filter");
  const galleries = all("[data-gallery]");
  if (!form || !galleries.length) return;
  const STEP = 24;
  const brief = (x) => (x === 0 ? "0" : x < 1e-4 ? x.toExponential(2) : x.toPrecision(3));

  for (const gallery of galleries) {
    const run = data.runs[Number(gallery.dataset.gallery)];
    const list = gallery.querySelector("ol");
    const status = gallery.querySelector("[role=status]");
    const more = gallery.querySelector("button");
    const pairs = run.pairs;
    if (!pairs) continue;
    const small = list.querySelector("img.pixels") !== null;
    const pictures = { ...run.pictures };
    for (const li of all(`li[data-run="${gallery.dataset.gallery}"]`)) {
      pictures[li.dataset.index] = all("img", li).map((img) => img.src);
    }
    const pictured = Object.keys(pictures).length;
    let count = STEP;

    const image = (src, alt) => make("img", { src, alt, className: small ? "pixels" : "" });
    const card = (i) => {
      const index = pairs.index[i];
      const known = pictures[index];
      const facts = make("dl");
      const fact = (name, text) => facts.append(make("dt", { textContent: name }), make("dd", { textContent: text }));
      if (pairs.ratio) fact("ratio", brief(pairs.ratio[i]));
      if (pairs.d1) fact("RMS", brief(pairs.d1[i]));
      if (pairs.id) fact("image", `${pairs.id[i]}${pairs.mirrored && pairs.mirrored[i] ? " mirrored" : ""}`);
      const text = make("div");
      if (pairs.memorized) {
        const said = pairs.memorized[i] ? "● memorized" : "○ not flagged";
        text.append(make("span", { className: "badge", textContent: said }));
      }
      text.append(facts);
      const li = make("li", { className: pairs.memorized && pairs.memorized[i] ? "copied" : "" });
      if (known) {
        const near = pairs.id ? `, id ${pairs.id[i]}` : "";
        li.append(image(known[0], `Generation ${index} of ${run.name}`), image(known[1], `Its nearest training image${near}`));
      } else li.append(make("span", { className: "none", textContent: `generation ${index}: no picture stored` }));
      li.append(text);
      return li;
    };

    const show = () => {
      const { verdict, measure, most, sort, drawn } = form.elements;
      const limit = most.value === "" ? Infinity : Number(most.value);
      const values = pairs[measure.value];
      let rows = pairs.index.map((_, i) => i).filter((i) => (
        (verdict.value === "all" || !pairs.memorized || (pairs.memorized[i] === 1) === (verdict.value === "memorized"))
        && (!values || limit === Infinity || (values[i] !== null && values[i] <= limit))
        && (!drawn.checked || pictures[pairs.index[i]])));
      const [key, sign] = [sort.value.slice(1), sort.value[0] === "-" ? -1 : 1];
      if (pairs[key]) rows = rows.sort((a, b) => sign * (pairs[key][a] - pairs[key][b]) || a - b);
      list.replaceChildren(...rows.slice(0, count).map(card));
      const shown = Math.min(count, rows.length);
      const parts = [`${shown} shown of ${rows.length.toLocaleString("en")} that match`];
      const listed = pairs.index.length;
      parts.push(`${listed < pairs.total ? `the ${listed.toLocaleString("en")} lowest ratios of ` : ""}${pairs.total.toLocaleString("en")} generations, ${pictured} with pictures`);
      status.textContent = `${parts.join("; ")}.`;
      more.hidden = rows.length <= count;
    };
    more.addEventListener("click", () => { count += STEP; show(); });
    form.addEventListener("input", () => { count = STEP; show(); });
    form.addEventListener("reset", () => setTimeout(() => { count = STEP; show(); }));
    form.addEventListener("submit", (event) => event.preventDefault());
    gallery.querySelector("h4 span.plain").textContent = "generations and their nearest training images";
    show();
  }

  // Print: everything opened, and closed again afterwards as it was.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((node) => { node.open = true; });
  });
  window.addEventListener("afterprint", () => closed.forEach((node) => { node.open = false; }));
})();
