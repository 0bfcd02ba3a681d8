"""Print a constraints file with the lowest version of every dependency that setup.cfg allows.

All but torch and torchvision, whose builds depend on the machine, and our own package.
"""

import configparser
import re
import sys
from pathlib import Path

EXCEPT = {"torch", "torchvision", "cl-merge"}

config = configparser.ConfigParser()
config.read(Path(__file__).parent.parent / "setup.cfg")
words = [config["options"]["install_requires"], *config["options.extras_require"].values()]
wanted = [line for block in words for line in block.splitlines() if line]
for line in sorted(set(wanted)):
    found = re.fullmatch(r"([\w.-]+)(\[.*\])?(?:>=([\w.]+))?(,<[\w.]+)?", line)
    if found is None:
        raise SystemExit(f"setup.cfg: '{line}' is not of the form name[extra]>=version,<version")
    name, _, lowest, _ = found.groups()
    if name in EXCEPT:
        continue
    if lowest is None:
        raise SystemExit(f"setup.cfg: '{name}' has no lower bound; write {name}>=VERSION")
    sys.stdout.write(f"{name}=={lowest}\n")
