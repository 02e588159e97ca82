"""The alternatives that GRASP is judged against, each in a file of its own, and what they share.

settings.py              what an arm of `project.arms` says of them
residual_stream.py       hooks on the residual stream; the base without a second model
activation_shift.py      how far a naive fine-tune moved the residual stream, and along which directions
training.py              from settings to a fine-tune's examples and objective
post_hoc.py              those that change a naive adapter instead
"""
