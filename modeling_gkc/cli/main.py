# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Entry point of the `gkc` command, and its top-level argument parser."""

import argparse
import sys
from collections.abc import Sequence

from ..label_text import shortened
from ..version import __version__
from .common import UserError, interruptible
from .parsers import add_convert, add_embed, add_export, add_open, add_segment, add_vocab

DESCRIPTION = "Open-vocabulary image segmentation: segment images with any words."
EXAMPLES = """\
examples:
  gkc segment scene.png --labels "red disc; lawn, grass; sky"
  gkc vocab list
  gkc embed --labels "red disc; lawn, grass" --out words.safetensors
  gkc open my-mask2former/ --with my-clip/ --out my-words
  gkc convert clip-resnet RN50.pt --out rn50
  gkc export my-checkpoint --vocab ade20k_150 --out ade-onnx

See `gkc COMMAND --help` for each command.

exit codes: 0 success; 1 some inputs failed (each is named); 2 wrong arguments; 130 interrupted.
"""


@interruptible("gkc")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the `gkc` command.

    Args:
        argv: Arguments without the program name; default: `sys.argv[1:]`.

    Returns:
        Exit code: 0 for success, 1 if some inputs failed, 2 for wrong arguments, 130 if interrupted by Ctrl-C.

    Raises:
        SystemExit: With code 2 if the arguments cannot be parsed, and with code 0 for `--help`.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"gkc: error: {shortened(str(error))}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gkc",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in (add_segment, add_vocab, add_embed, add_open, add_convert, add_export):
        add_command(commands)
    return parser


__all__ = ["main"]
