"""How a main script starts and ends: faults as sentences, exit codes that mean something."""

import sys
from collections.abc import Callable

from utils.device import out_of_memory
from utils.distributed import Ranks
from utils.errors import UserError
from utils.loop import TrainingStopped


def run_main(main: Callable[[], None]) -> None:
    """Run `main` and exit: 2 on bad input or a full disk, 1 on a stopped training, 75 where
    --max_minutes are over, 128 + n on a signal."""
    is_main = Ranks.from_environment().is_main
    code = 0
    try:
        main()
    except UserError as error:
        code = 2
        if is_main:
            print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
    except TrainingStopped as stop:
        code = stop.exit_code
        if is_main:
            print(stop, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("Interrupted.", file=sys.stderr)
    except OSError as error:  # a full disk, a folder that vanished
        code = 2
        print(f"{sys.argv[0]}: error: {error}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        code = 1
        print(
            f"Out of memory: lower --batch_size or the size of the task. ({error})", file=sys.stderr
        )
    finally:
        Ranks.disconnect()
    sys.exit(code)
