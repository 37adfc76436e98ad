//! x86-64: where things lie in memory, and how a CPU looks at the moment a kernel is entered.

pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod paging;
pub mod registers;
