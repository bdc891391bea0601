"""Number of fields of a protobuf message, counted before it is parsed.

protobuf makes an object of each field while no other thread of Python runs: 8 MiB of texts of no characters are 4
million fields, which blocked the event loop for over a second on a busy machine.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import Default

from starling.engine_ext.front.bounds import FIELDS

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types of fields (protobuf's encoding); 3 and 4 are groups, which no message of starling.v1 has."""


def method_of(path: str) -> MethodDescriptor | None:
    """Return the method of a call's path, "/package.Service/Method", or None if this process has no code for it."""
    service, _, method = path.removeprefix("/").partition("/")
    try:
        return Default().FindServiceByName(service).methods_by_name.get(method)
    except KeyError:
        return None


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number on the wire, and the position of the next field.

    Raises:
        IndexError: the data ends before the number does.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def check_num_fields(data: bytes, message: Descriptor) -> None:
    """Check how many fields a message and its inner messages have. Packed numbers, and a map's entry, are one field.

    Data that is not a message is left to the parser, which reports it.

    Raises:
        VLLMValidationError: there are more than FIELDS.
    """
    if len(data) <= 2 * FIELDS.limit:  # a field has two bytes at least
        return
    count, left = 0, [(0, len(data), message)]
    try:
        while left:
            at, end, kind = left.pop()
            while at < end:
                count += 1
                if count > FIELDS.limit:
                    FIELDS.check(count)
                tag, at = varint(data, at)
                wire = tag & 7
                if wire == VARINT:
                    _, at = varint(data, at)
                elif wire == LENGTH:
                    size, at = varint(data, at)
                    inner = inner_message(kind, tag >> 3)
                    if inner is not None:
                        left.append((at, at + size, inner))
                    at += size
                elif wire in (FIXED64, FIXED32):
                    at += 8 if wire == FIXED64 else 4
                else:
                    return
    except IndexError:
        return


def inner_message(message: Descriptor, number: int) -> Descriptor | None:
    """Return the message type of the field of a number, or None if it holds no message or an entry of a map."""
    field = message.fields_by_number.get(number)
    if field is None or field.type != FieldDescriptor.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
        return None
    inner: Descriptor = field.message_type
    return inner
