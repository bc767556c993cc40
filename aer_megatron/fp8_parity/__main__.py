import sys

from aer_megatron.fp8_parity.command import main

sys.exit(main())
