"""The log as TensorBoard shows it."""

from pathlib import Path

from common.errors import UserError


class Board:
    """Writes a log's rows into an event file in `folder`, one scalar a column, by epoch.

    Shown the log for the first time, it writes all of it anew: a resumed run has each epoch once.
    One that is not wanted does nothing.
    """

    def __init__(self, folder: Path, *, wanted: bool = True):
        self.folder, self.make_writer, self.writer, self.written = folder, None, None, 0
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(f"--tensorboard: {error}: pip install tensorboard") from error
        self.make_writer = SummaryWriter

    def __call__(self, rows: list[dict]) -> None:
        try:
            if self.make_writer:
                self._write(rows)
        except OSError as error:  # a full disk does not end a run for want of its curves
            print(
                f"warning: {self.folder}: the event file could not be written ({error.strerror})",
                flush=True,
            )

    def _write(self, rows: list[dict]) -> None:
        if self.writer is None:
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
            self.writer = self.make_writer(self.folder)
        for row in rows[self.written :]:
            for name, value in row.items():
                if isinstance(value, list):  # such as gates
                    for i, number in enumerate(value):
                        self.writer.add_scalar(f"{name}/{i}", number, row["epoch"])
                elif name != "epoch":
                    self.writer.add_scalar(name, value, row["epoch"])
        self.written = len(rows)
        self.writer.flush()
