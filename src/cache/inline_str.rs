//! A string that is stored in place up to the length of an id.
//!
//! `compact_str` and `smol_str` hold at most 24 bytes in place, and a UUID has 36.

/// The longest string that is stored in place.
const INLINE: usize = 38;

/// An owned string. A comparison with one that is stored in place follows no pointer.
pub(super) enum InlineStr {
    Inline { len: u8, bytes: [u8; INLINE] },
    Boxed(Box<str>),
}

const _: () = assert!(size_of::<InlineStr>() == 40);

impl InlineStr {
    #[inline]
    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Inline { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or(bytes),
            Self::Boxed(text) => text.as_bytes(),
        }
    }

    /// Returns the bytes of a string that would be stored elsewhere.
    #[inline]
    pub(super) fn heap_bytes_for(text: &str) -> usize {
        match text.len() {
            ..=INLINE => 0,
            more => more,
        }
    }

    /// Returns the bytes that are stored elsewhere.
    #[inline]
    pub(super) fn heap_bytes(&self) -> usize {
        match self {
            Self::Inline { .. } => 0,
            Self::Boxed(text) => text.len(),
        }
    }

    /// Returns the string. This checks the encoding each time; a comparison of bytes does not.
    pub(super) fn as_str(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl From<&str> for InlineStr {
    #[inline]
    fn from(text: &str) -> Self {
        let mut bytes = [0; INLINE];
        match bytes.get_mut(..text.len()) {
            Some(begin) => {
                begin.copy_from_slice(text.as_bytes());
                Self::Inline {
                    len: text.len() as u8,
                    bytes,
                }
            }
            None => Self::Boxed(text.into()),
        }
    }
}

impl PartialEq<str> for InlineStr {
    #[inline]
    fn eq(&self, text: &str) -> bool {
        self.as_bytes() == text.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_of_any_length_is_kept() {
        let digits = "0123456789".repeat(10);
        for len in 0..=digits.len() {
            let text = &digits[..len];
            let kept = InlineStr::from(text);
            assert_eq!(kept.as_str(), text);
            assert!(kept == *text);
            assert_eq!(matches!(kept, InlineStr::Inline { .. }), len <= INLINE);
            for other in (0..=digits.len()).filter(|other| *other != len) {
                assert!(kept != digits[..other], "{len} and {other}");
            }
        }
    }

    #[test]
    fn a_string_differs_from_one_with_trailing_zeros() {
        for (one, other) in [("a\0", "a"), ("a", "a\0"), ("", "\0")] {
            let kept = InlineStr::from(one);
            assert!(kept == *one && kept != *other);
        }
    }

    #[test]
    fn a_character_of_several_bytes_is_not_cut() {
        let text = "ü".repeat(INLINE / 2);
        assert_eq!(InlineStr::from(&*text).as_str(), text);
        let text = format!("a{text}");
        assert_eq!(InlineStr::from(&*text).as_str(), text);
    }
}
