"""torchrun that ends as the rank ended that failed first: with its exit status, and no more words.

python -m common.torchrun --standalone --nproc-per-node 2 -m Llama.train Llama/train_configs/stdlib.toml
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Run torchrun's command line."""
    try:
        run.main()
    except ChildFailedError as error:  # the rank has said itself what was wrong
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)  # negative: a signal


if __name__ == "__main__":
    main()
