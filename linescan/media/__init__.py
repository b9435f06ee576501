"""Images, videos and point clouds: reading, preprocessing, writing, drawing."""
