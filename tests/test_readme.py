"""README's example runs as it stands, and is as short as README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "README has one example"
    return blocks[0]


def test_the_example_has_at_most_twenty_lines():
    assert len(example().splitlines()) <= 20


def test_the_example_runs_and_prints_the_right_answer(tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example())
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0, done.stderr
    norms, squares = done.stdout.splitlines()
    # The largest of 400,000 seeded points' norms, which lie below sqrt(3).
    assert re.fullmatch(r"400,000 norms, the largest is 1\.7\d\d\d", norms)
    assert squares == "squares: [0, 1, 4, 9, 16, 25, 36, 49]"


def test_links_lead_to_files_of_the_repository():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
