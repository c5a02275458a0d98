//! The two-link lab.
