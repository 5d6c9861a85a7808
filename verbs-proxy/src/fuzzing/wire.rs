//! What travels in slots: whatever is read from one and packed again is read as the same, and asks for no more than there can be.

use crate::device::soft::wire::{Request, Response};
use arbitrary::Unstructured;
use ringfence_protocol::completion::Completion;
use ringfence_protocol::work::{
    EXTENSION_INLINE, MAX_EXTENSIONS, MAX_INLINE, ReceiveBase, SGES_PER_EXTENSION, SendBase, extension_inline,
    extension_sge, pack_inline, pack_sges,
};

/// One input: a slot, over and over.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    while input.len() >= 64
        && let Ok(words) = input.arbitrary::<[u64; 8]>()
    {
        let fields = SendBase(words).fields();
        assert_eq!(SendBase::pack(&fields).fields(), fields);
        assert_eq!(SendBase::pack_inline(&fields, &SendBase(words).inline_head()).inline_head(), words[4..]);
        assert!(fields.extensions().is_none_or(|count| count <= MAX_EXTENSIONS));

        let receive = ReceiveBase(words);
        let again = ReceiveBase::pack(receive.wr_id(), receive.sges(), receive.sge());
        assert_eq!((again.wr_id(), again.sges(), again.sge()), (receive.wr_id(), receive.sges(), receive.sge()));
        assert!(receive.extensions().is_none_or(|count| count <= MAX_EXTENSIONS));

        let elements: Vec<_> = (0..SGES_PER_EXTENSION).map(|index| extension_sge(&words, index)).collect();
        let packed = pack_sges(&elements);
        assert!((0..SGES_PER_EXTENSION).all(|index| extension_sge(&packed, index) == elements[index as usize]));
        assert_eq!(extension_inline(&pack_inline(&extension_inline(&words))), extension_inline(&words));

        let request = Request::unpack(&words);
        assert_eq!(Request::unpack(&request.pack()), request);
        // All of a neighbour's inline data are in extensions.
        assert!(request.extensions().is_none_or(|count| count <= MAX_INLINE.div_ceil(EXTENSION_INLINE)));
        let response = Response::unpack(&words);
        assert_eq!(Response::unpack(&response.pack()), response);

        let completion = Completion::unpack(&words);
        assert_eq!(Completion::unpack(&completion.pack()), completion);
    }
}
