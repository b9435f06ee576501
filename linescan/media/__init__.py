"""Images and videos: reading, preprocessing, writing, drawing."""
