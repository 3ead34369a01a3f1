"""Built-in stories: a world of things, plots, and a teller who keeps track of who and what was mentioned."""

from moemla.stories.teller import MAX_WORDS, MIN_WORDS, Agreement, Story, stories, story

__all__ = ["MAX_WORDS", "MIN_WORDS", "Agreement", "Story", "stories", "story"]
