"""``aer convert hf-to-megatron`` from a checkout: the same arguments."""

import sys

from aer_megatron.conversion.command import main

if __name__ == "__main__":
    sys.exit(main(["hf-to-megatron", *sys.argv[1:]]))
