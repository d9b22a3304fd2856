"""Uses at build time what the formatters stand on: a version that does not fit is missed here, not in a session."""

import matplotlib.pyplot as plt
import pandas as pd

from cellblock_e2b import chart_data, frame_data

figure, axes = plt.subplots()
axes.boxplot([[1, 2, 3], [2, 3, 9]], tick_labels=["a", "b"], patch_artist=True)
axes.set_title("boxes")
chart = chart_data(figure)
assert chart["type"] == "box_and_whisker" and chart["title"] == "boxes" and len(chart["elements"]) == 2, chart
frame = pd.DataFrame({"n": [1, 2], "at": pd.to_datetime(["2024-01-01", None]), "x": [0.5, float("nan")]})
assert frame_data(frame) == {"n": [1, 2], "at": ["2024-01-01T00:00:00", None], "x": [0.5, None]}, frame_data(frame)
