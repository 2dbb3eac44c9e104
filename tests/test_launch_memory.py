import os
import subprocess
import sys

from contrastive_align.launch import memory


PROBE = """
import runpy, sys

keep_freed_memory = runpy.run_path(sys.argv[2])["keep_freed_memory"]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

asked = keep_freed_memory() if sys.argv[1] == "keep" else False
before = resident()
block = b"x" * 2**28
del block
print(asked, (resident() - before) / 2**28)
"""


def probe(argument: str, **environment: str) -> tuple[str, float]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", PROBE, argument, memory.__file__], env=env, capture_output=True, text=True, check=True
    )
    asked, kept = done.stdout.split()
    return asked, float(kept)


def test_freed_blocks_stay_where_glibc_can_be_asked():
    asked, kept = probe("keep")
    assert kept > 0.9 if asked == "True" else kept < 0.1
    asked, kept = probe("leave")
    assert asked == "False" and kept < 0.1


def test_the_environment_comes_first(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert memory.keep_freed_memory() is False
    assert probe("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
