import sys

from mmgen_kernels.cli import main

sys.exit(main())
