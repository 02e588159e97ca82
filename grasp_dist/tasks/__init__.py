"""What the ranks do for each task of a run: train, detect, screen, score, and write what came of it.

`grasp_dist.stages` decides what has to run, and `grasp_dist.graph` what a task is made from. `Worker` takes the tasks
in turn; a stage's work is in the file of its name, and what all of them need in `workbench.py`.
"""

from grasp_dist.tasks.worker import Worker

__all__ = ["Worker"]
