"""The processes that torchrun started: the first runs the stages, the others help it to train."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from core.choices import Diverged
from core.config import TrainConfig
from stages.setup import Setup
from training.distributed import Group, Meeting, by_torchrun, leave_group, torchrun_meeting


class Crew:
    """This process among those that train one classifier; alone unless torchrun started it and train.use_ddp is on."""

    def __init__(self, setup: Setup):
        self._train, self._device = setup.config.train, setup.device

    @property
    def meeting(self) -> Meeting | None:
        """The other processes, if torchrun started this one among them."""
        train = self._train
        return torchrun_meeting(self._device, train.ddp_timeout) if train.use_ddp and by_torchrun() else None

    @property
    def train_config(self) -> TrainConfig:
        """The classifier's training settings; the number of processes is torchrun's where it started this one."""
        meeting = self.meeting
        return replace(self._train, num_workers=meeting.group.world) if meeting else self._train

    def take_part(self, work: Callable[[dict, Group], None]) -> bool:
        """Help the first process to train, in all others of torchrun's, until it dismisses them.

        Args:
            work: trains what a job of the first process describes, and writes nothing.

        Returns:
            False, at once, in the first process and where there is just one.
        """
        meeting = self.meeting
        if meeting is None or meeting.group.leads:
            return False
        while (job := meeting.next_job()) is not None:
            with suppress(Diverged):  # the first process meets the same at the same step, and says it
                work(job, meeting.group)
        leave_group()
        return True

    def dismiss(self) -> None:
        """Let the other processes go; called by the first one at the end."""
        if meeting := self.meeting:
            meeting.announce(None)
            leave_group()
