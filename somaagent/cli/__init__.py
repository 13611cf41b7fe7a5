"The soma command"
