"""The alternatives that GRASP is judged against."""
