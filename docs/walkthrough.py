"""Run the commands of walkthrough.md and put what they print into the page: python docs/walkthrough.py [PAGE]

A block of text is the output of the commands above it. A comment between the two may choose from it:

    <!-- lines: validation|cache -->    lines in which this pattern is found; without a comment: all
    <!-- bars: tokens/s -->             a bar for each command, named by its comment: the best of three such numbers

Commands run in an empty folder, after the kernels are compiled. All of it takes about five minutes.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(
    r"^```bash\n(?P<commands>.*?)^```\n\n(?:<!-- (?P<how>lines|bars): (?P<what>.*?) -->\n\n)?"
    r"^```text(?P<kind>.*?)\n.*?^```",
    re.MULTILINE | re.DOTALL,
)
LONGEST_BAR, COLUMNS = 40, 100
"""Widths of the longest bar and of the terminal, in characters."""


def output_of(command: str, folder: Path) -> str:
    """Return what a command prints on both streams."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": str(COLUMNS)}
    print(f"$ {command}", file=sys.stderr, flush=True)
    how = {"shell": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, env=env, **how)
    if done.returncode:
        raise RuntimeError(f"{command} ended with status {done.returncode}: {done.stdout}")
    return done.stdout


def bars(outputs: dict[str, str], unit: str) -> list[str]:
    """Return a line with a bar for each output by its name: the largest number before the unit."""
    found = {name: re.findall(rf"([\d.,]+) {re.escape(unit)}", text) for name, text in outputs.items()}
    values = {name: max(float(number.replace(",", "")) for number in numbers) for name, numbers in found.items()}
    longest, width = max(values.values()), max(map(len, values))
    drawn = {name: "█" * max(1, round(LONGEST_BAR * value / longest)) for name, value in values.items()}
    return [f"{name:{width}}  {bar:{LONGEST_BAR}}  {values[name]:>6,.0f} {unit}" for name, bar in drawn.items()]


def with_output(block: re.Match[str], folder: Path) -> str:
    """Return a block of commands, the comment that follows it, and its output of now."""
    commands = block["commands"].replace("\\\n", " ").strip().splitlines()
    outputs = dict.fromkeys(commands, "")
    for line in commands * (3 if block["how"] == "bars" else 1):  # in turns: others use the machine too
        outputs[line] += output_of(line, folder)
    lines = "".join(outputs.values()).splitlines()
    if block["how"] == "bars":
        lines = bars({line.partition("# ")[2]: text for line, text in outputs.items()}, block["what"])
    elif block["how"] == "lines":
        lines = [line for line in lines if re.search(block["what"], line)]
    before = block[0].partition("```text")[0]
    text = "\n".join(line.rstrip() for line in lines).strip("\n")
    return f"{before}```text{block['kind']}\n{text}\n```"


if __name__ == "__main__":
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    with tempfile.TemporaryDirectory() as folder:
        output_of('python -c "import dsmini; dsmini.prepare()"', Path(folder))
        start = 0
        while block := BLOCK.search(text := page.read_text(), start):  # written at once: an interrupt loses one block
            made = with_output(block, Path(folder))
            start = block.start() + len(made)
            page.write_text(text[: block.start()] + made + text[block.end() :])
