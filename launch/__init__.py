"""Where the stages run: today as processes on this machine."""
