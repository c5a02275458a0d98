//! How a field of a hook's context is read and written; see `ctx.rs` for the why.

/// Reads one field of a context.
macro_rules! load {
    ($field:expr) => {
        // SAFETY: the context is valid while the program runs; the verifier checks offset and width.
        unsafe { core::ptr::read_volatile(&raw const $field) }
    };
}

/// Reads four words of a context one by one.
macro_rules! load4 {
    ($field:expr) => {
        [
            load!($field[0]),
            load!($field[1]),
            load!($field[2]),
            load!($field[3]),
        ]
    };
}

pub(crate) use {load, load4};
