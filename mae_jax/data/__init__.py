"""Data: sources of pictures, host transforms, global order and batches, device augmentation."""
