"""The micro VILA: a whole VILA of about a million parameters, trained in minutes on real digits.

`digits` has the images, `words` and `documents` the text, `instructions` the conversations, `tasks` what
is measured, `recipe` the sizes and stages, and `demo` runs it all.
"""
