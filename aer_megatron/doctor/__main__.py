import sys

from aer_megatron.doctor.command import main

sys.exit(main())
