"""Where a checkpoint lives (`hub`), tensors on disk (`checkpoint`), loading and saving (`pretrained`), `convert`."""
