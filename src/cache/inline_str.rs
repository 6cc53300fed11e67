//! An id where it is used.

/// The longest text that needs no memory of its own: a UUID has 36 bytes.
const INLINE: usize = 38;

/// A text of its own, in place unless it is long: to compare it no pointer is followed.
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

    /// Checks the bytes each time: to compare texts, compare their bytes.
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
    fn a_text_of_any_length_is_what_it_was_made_of() {
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
    fn a_text_is_told_from_one_that_goes_on_with_zeros() {
        for (one, other) in [("a\0", "a"), ("a", "a\0"), ("", "\0")] {
            let kept = InlineStr::from(one);
            assert!(kept == *one && kept != *other);
        }
    }

    #[test]
    fn a_long_char_is_not_cut() {
        let text = "ü".repeat(INLINE / 2);
        assert_eq!(InlineStr::from(&*text).as_str(), text);
        let text = format!("a{text}");
        assert_eq!(InlineStr::from(&*text).as_str(), text);
    }
}
