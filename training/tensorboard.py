"""The log as TensorBoard event files (optional: pip install tensorboard)."""

from pathlib import Path

from common.optional import import_optional


class TensorBoardLogger:
    """Writes the rows of a log into an event file, one scalar per column and epoch.

    The first call writes the whole history and removes older event files, so that a resumed run
    has each epoch once. Raises UserError where tensorboard is not installed.
    """

    def __init__(self, folder: Path):
        module = import_optional(
            "torch.utils.tensorboard", purpose="--tensorboard", install="tensorboard"
        )
        self.folder, self.make_writer = folder, module.SummaryWriter
        self.writer, self.num_written = None, 0

    def __call__(self, history: list[dict]) -> None:
        try:
            self._write(history)
        except OSError as error:  # a full disk must not end a run for its curves
            print(f"warning: {self.folder}: the event file could not be written ({error.strerror})")

    def _write(self, history: list[dict]) -> None:
        if self.writer is None:
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
            self.writer = self.make_writer(self.folder)
        for row in history[self.num_written :]:
            for name, value in row.items():
                if isinstance(value, list):  # such as gates
                    for i, number in enumerate(value):
                        self.writer.add_scalar(f"{name}/{i}", number, row["epoch"])
                elif name != "epoch":
                    self.writer.add_scalar(name, value, row["epoch"])
        self.num_written = len(history)
        self.writer.flush()
