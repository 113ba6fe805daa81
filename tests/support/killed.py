"""A training that dies in its middle."""


def train_until(trainer, until=None, before_step=lambda trainer: None):
    """Train; before the step after ``until`` steps it dies, as if killed. ``before_step`` is called before every other one."""
    step = trainer._step

    def watched_step():
        if trainer.progress.step == until:
            raise KeyboardInterrupt
        before_step(trainer)
        return step()

    trainer._step = watched_step
    try:
        trainer.setup()
        trainer.train()
    except KeyboardInterrupt:
        assert until is not None
    finally:
        trainer.close()
    return trainer
