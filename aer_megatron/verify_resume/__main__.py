import sys

from aer_megatron.verify_resume.command import main

sys.exit(main())
