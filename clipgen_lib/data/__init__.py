"""Images: how they are read, batched and cropped, and the embedded Shapes world."""
