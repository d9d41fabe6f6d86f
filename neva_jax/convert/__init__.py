"""Other people's weights: one engine (`keymap`), one table per format (`hf`), lazy readers (`weights`). A new model family is a new table, no new logic."""
