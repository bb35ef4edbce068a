"""Pages in and out on CPUs: ctypes over the C++ library of csrc/."""
