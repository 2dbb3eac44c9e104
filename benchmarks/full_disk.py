"""Small disks that run full while a run saves: a sentence, and after room is made the run goes on.

    sudo python benchmarks/full_disk.py [--command reward ...] [--sizes 1 4 8 ...]

Each training command runs into a small tmpfs (root is needed to mount it), of so many megabytes that another file is
the one that does not fit: a checkpoint's weights, its optimiser's state, a round of samples, the trained model. It
must end with exit status 2 and a sentence. Then the disk is made larger, and the same command line with
``--resume_from_checkpoint=true`` must end with the weights of an undisturbed run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from kill import COMMANDS, run, same, write_data


def mount(folder: Path, size: str, *, again: bool = False) -> None:
    options = f"size={size}" + (",remount" if again else "")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def trial(command: str, data: Path, disk: Path, size: int) -> tuple[str, str]:
    """Return what was said of the full disk, and what is wrong, or ""."""
    mount(disk, f"{size}k")
    try:
        ended = run(command, data, disk / "run")
        if ended.status == 0:
            return "large enough", same(data / f"{command}-whole", disk / "run")
        said = ended.said[ended.said.rindex("error:") :].split("\n")[0] if "error:" in ended.said else ""
        if ended.status != 2 or "Traceback" in ended.said or "No space left" not in said:
            return said, f"exit {ended.status}: {ended.said[-900:]}"
        mount(disk, "200m", again=True)
        ended = run(command, data, disk / "run", "--resume_from_checkpoint=true")
        if ended.status:
            return said, f"with room, exit {ended.status}: {ended.said[-900:]}"
        return said, same(data / f"{command}-whole", disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    kilobytes = [0.004, 0.02, 1, 4, 6, 8, 9.5, 10, 12, 16, 19, 20, 22, 24]
    parser.add_argument("--sizes", nargs="+", type=float, default=kilobytes, help="of the disk, in MB")
    args = parser.parse_args(argv)
    from contrastive_align.launch import common, conditional, contrastive, fdpg  # noqa: F401 - before the forks: once

    failures = trials = 0
    with TemporaryDirectory() as name:
        data = Path(name)
        write_data(data)
        (disk := data / "disk").mkdir()
        for command in args.command:
            assert run(command, data, data / f"{command}-whole").status == 0
            for size in args.sizes:
                said, problem = trial(command, data, disk, round(size * 1000))
                failures, trials = failures + bool(problem), trials + 1
                said = said.replace(str(disk), "DISK")
                print(f"{command:<12} {size:6.3f} MB  {problem or 'the same weights'}  ({said})", flush=True)
        shutil.rmtree(disk)
    print(f"{trials} disks, {failures} runs that ended wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
