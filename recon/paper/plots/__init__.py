"""Figures by topic: data frames of runs in, a figure, the data frame of what it draws and the finding out."""
