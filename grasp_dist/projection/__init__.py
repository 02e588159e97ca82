"""Projection: keep protected weights unchanged along a basis, on sharded parameters, without gathering them."""

from grasp_dist.projection.projector import GraspProjector

__all__ = ["GraspProjector"]
