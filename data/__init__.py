"""Making, fetching and splitting data sets: shapes.py, download.py, splits.py; README.md says what
lies where."""
