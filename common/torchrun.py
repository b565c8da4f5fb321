"""torchrun with the exit status of the rank that failed first, and an immediate error for a port in use.

python -m common.torchrun --standalone --nproc-per-node 2 -m nanoGPT.train nanoGPT/configs/stdlib.toml
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common.guard import main_guard
from common.rendezvous import refuse_foreign_listener


def main() -> None:
    """Run torchrun's command line."""
    address, port = meeting_point(sys.argv[1:])
    if port:
        refuse_foreign_listener(address, port)  # torchrun would wait for its answer forever
    try:
        run.main()
    except ChildFailedError as error:  # the rank has printed its error
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)  # negative: a signal


def meeting_point(arguments: list[str]) -> tuple[str, int]:
    """Return host and port of a torchrun command line; port 0 where torchrun takes a free one."""
    options = run.parse_args(arguments)
    if options.standalone:
        return "localhost", 0
    if options.rdzv_endpoint:
        address, _, port = options.rdzv_endpoint.rpartition(":")
        return address or options.rdzv_endpoint, int(port) if port.isdigit() else 0
    return options.master_addr, options.master_port


if __name__ == "__main__":
    main_guard(main)
