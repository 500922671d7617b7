"""Prepare samples for training: any files of records become Energon WebDataset shards (docs/prepare_data.md).

Example: python tools/prepare_data.py train.json --media-dir videos --out prepared
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.data.prepare.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
