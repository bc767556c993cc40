"""``aer convert hf-to-fp8`` from a checkout: the same arguments."""

import sys

from aer_megatron.conversion.command import main

if __name__ == "__main__":
    sys.exit(main(["hf-to-fp8", *sys.argv[1:]]))
