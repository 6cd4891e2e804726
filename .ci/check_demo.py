"""What README.md promises of `make demo`, checked on its report.json."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
standard, ambient = report["standard"], report["ambient"]
promises = {
    "at most 10 minutes": report["seconds"] <= 600,
    "below 4 GB": report["peak_rss_gb"] < 4,
    "the standard twin memorizes": standard["memorized"]["value"] >= 0.5,
    "standard control": standard["control"]["high"] <= 0.05,
    "ambient control": ambient["control"]["high"] <= 0.05,
    "256 generations each": min(run["memorized"]["n"] for run in (standard, ambient)) >= 256,
    "every estimate inside its interval": all(
        run[name]["low"] <= run[name]["value"] <= run[name]["high"]
        for run in (standard, ambient)
        for name in ("memorized", "control", "excess", "quality")
    ),
}
for promise, kept in promises.items():
    print(f"{'ok    ' if kept else 'BROKEN'} {promise}")
print(f"demo: {report['seconds']} s, {report['peak_rss_gb']} GB")
sys.exit(not all(promises.values()))
