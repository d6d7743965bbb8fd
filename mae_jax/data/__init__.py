"""Data: sources of pictures, host transforms, global order and batches, device augmentation.

Nothing is imported here, so that reader processes do not load more than they need.
"""
