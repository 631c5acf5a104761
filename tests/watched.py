"""vLLM's scheduler, which notes in a file what each step does; vLLM loads it by name, in its own process."""

import os

from vllm.v1.core.sched.scheduler import Scheduler


class Watched(Scheduler):
    """Writes a line a step: how many requests it serves, and how many tokens it computes."""

    def schedule(self, *args, **settings):
        made = super().schedule(*args, **settings)
        if made.num_scheduled_tokens:
            with open(os.environ["STEPS"], "a") as file:
                file.write(f"{len(made.num_scheduled_tokens)} {made.total_num_scheduled_tokens}\n")
        return made
