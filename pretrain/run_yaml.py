"""The resolved configuration of a run, in the run's folder."""

import itertools
from pathlib import Path

from lrnn.errors import UserError
from lrnn.files import write_atomically
from lrnn.pretrain.config import Config
from lrnn.settings import dump


def write_config(config: Config) -> None:
    """Write `run.yaml` into the run's folder. An earlier one that differs is kept beside it as `run.N.yaml`.

    Raises:
        UserError: the folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    file, content = run_dir / "run.yaml", dump(config)
    try:
        if file.exists() and file.read_bytes() != content.encode():
            names = (run_dir / f"run.{number}.yaml" for number in itertools.count(1))
            write_atomically(next(name for name in names if not name.exists()), file.read_bytes())
        write_atomically(file, content)
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be written ({error.strerror}: {error.filename})") from None
