//! Shared map types.
#![no_std]
