//! The functions of a C library that compiled code calls without being asked to: copying a struct becomes `memcpy`.
//!
//! The string instructions do the work. They run at memory speed on hardware; where kernel mode is interpreted, the
//! interpreter decodes one instruction for the whole block, where a loop would cost it several for each byte. None
//! may be written as a Rust loop: the compiler would recognise it and call the function from within itself.

use core::arch::asm;

/// Copies bytes; the ranges do not overlap.
///
/// # Safety
/// Both ranges must be mapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

/// Copies bytes; the ranges may overlap.
///
/// # Safety
/// Both ranges must be mapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // Forwards is wrong only if the target begins inside the source. Then go backwards, from the last byte on.
    if to.addr().wrapping_sub(from.addr()) >= bytes {
        // SAFETY: the caller's promise.
        return unsafe { memcpy(to, from, bytes) };
    }
    let (last_to, last_from) = (to.wrapping_add(bytes - 1), from.wrapping_add(bytes - 1));
    // SAFETY: the caller's promise; the direction flag is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") last_to => _, inout("rsi") last_from => _,
            inout("rcx") bytes => _, options(nostack));
    }
    to
}

/// Fills bytes with one value.
///
/// # Safety
/// The range must be mapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") bytes => _,
            options(nostack, preserves_flags));
    }
    to
}

/// Compares bytes: negative, zero or positive as the first is less than, equal to or greater than the second.
///
/// # Safety
/// Both ranges must be mapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    if bytes == 0 {
        return 0;
    }
    let (a_end, b_end): (*const u8, *const u8);
    // SAFETY: the caller's promise. The instruction stops behind the first pair that differs, or at the end.
    unsafe {
        asm!("repe cmpsb", inout("rsi") a => a_end, inout("rdi") b => b_end, inout("rcx") bytes => _,
            options(nostack, readonly));
        i32::from(*a_end.sub(1)) - i32::from(*b_end.sub(1))
    }
}

/// Compares bytes: zero if they are equal.
///
/// # Safety
/// Both ranges must be mapped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, bytes) }
}
