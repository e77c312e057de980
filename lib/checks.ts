/**
 * Cleans and checks the values of local rows before they are compared with other rows or sent.
 *
 * Square checks most of a value itself, and its reason is stored in the row. This file only finds
 * what Square would accept wrongly, and what would make Square or the SDK reject a whole call. An
 * invalid value must never become another value that looks valid. For example, without its dot the
 * spreadsheet number `12065550100.0` would be another phone number.
 *
 * Phone numbers are not checked with libphonenumber-js, because it rejects numbers that Square
 * accepts.
 */

/** `text`: names, addresses and notes. `code`: postal codes and VAT numbers. */
export type TextKind = "text" | "email" | "phone" | "birthday" | "reference" | "code" | "country";

// The form of a cleaned value. The other kinds have any form.
const PATTERNS: Partial<Record<TextKind, { pattern: RegExp; expected: string }>> = {
  email: {
    pattern: /^[^\s@<>()[\]\\,;:"]+@[^\s@<>()[\]\\,;:"]+\.[^\s@<>()[\]\\,;:"]+$/,
    expected: "one address, for example ada@example.com",
  },
  phone: {
    // 00 is a prefix only in some countries, and no country code begins with 0.
    pattern: /^(?!00|\+0)\+?[0-9]{9,16}$/,
    expected: "9 to 16 digits, for example +12065550100",
  },
  birthday: {
    pattern: /^([0-9]{4}-)?(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$/,
    expected: "YYYY-MM-DD or MM-DD, for example 1990-04-25",
  },
  country: { pattern: /^[A-Z]{2}$/, expected: "a two-letter country code, for example US" },
};

// For example zero-width spaces, byte order marks and the blank Braille pattern. Names and notes keep
// them, because there they spell Persian and Indic names, and hold emoji together.
const INVISIBLE = /[\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]/gu;
const DASHES = /[\u2010-\u2015\u2212\u2043\ufe58\ufe63\uff0d]/g;

// Spreadsheets write a text in these forms if they mistake it for a number.
const DECIMALS = [
  /^[+-]?\d+[.,]0+$/, // 98101.0
  /^[+-]?\d{9,}[.,]\d+$/, // 12065550100.5
  /^[+-]?\d+[.,]\d+e[+-]?\d+$/i, // 1.2065550100E+10
  /^[+-]?\d+e[+-]\d+$/i, // 1e+05. Without a sign, as in 12e4567, it can be part of an id.
];

/**
 * Cleans and checks the value of a cell.
 * @param countries the codes that the SDK knows. An unknown code would make it reject a whole call
 *   of 100 rows. Without this parameter, the code is not compared
 * @returns the text to send, which is empty for a blank cell, or what is wrong with the cell
 */
export function cleanValue(value: unknown, kind: TextKind, countries?: ReadonlySet<string>) {
  if (value instanceof Uint8Array) return { problem: "holds bytes (a BLOB): store it as text" };
  const raw = String(value ?? "").trim();
  // SQLite replaces invalid UTF-8 by U+FFFD when it is read. The original letters would be lost.
  if (raw.includes("\uFFFD"))
    return { problem: "contains U+FFFD, which replaces damaged text (was the CSV Latin-1?)" };
  if (kind === "text") return { text: raw };

  let text = raw.replace(INVISIBLE, "").trim();
  if (text === "") return { text };
  if (DECIMALS.some((pattern) => pattern.test(text)))
    return { problem: "is invalid: it looks like a decimal number of a spreadsheet" };
  if (kind === "birthday") text = text.replace(DASHES, "-").replace(/^0000-/, "");
  if (kind === "country") text = text.toUpperCase();
  if (kind === "phone") text = removePunctuation(text.replace(DASHES, "-"));
  const rule = PATTERNS[kind];
  const isUnknownCountry = kind === "country" && countries?.has(text) === false;
  if (rule === undefined || (rule.pattern.test(text) && !isUnknownCountry)) return { text };
  return { problem: `is invalid: expected ${rule.expected}` };
}

/** Removes the space, brackets, dots and hyphens of a phone number. */
function removePunctuation(phone: string): string {
  // In +44 (0)20, the 0 is dialled only within the country. In Italy (39) and San Marino (378), it
  // is dialled from abroad too. So any (0) that is left makes the number invalid.
  const dialled = phone.replace(/^(\+(?!39|378)[1-9][0-9]{0,2}[\s.-]*)\(0\)/, "$1");
  if (dialled.includes("(0)")) return phone;
  // Do not touch a text with any other character, which would then look like a phone number.
  const isFormatted = /^[+(]*[0-9][0-9\p{Zs}().-]*$/u.test(dialled);
  return isFormatted ? dialled.replace(/[^+0-9]/g, "") : phone;
}

/**
 * Builds the values by which a row is compared with others. An empty text means blank, and equals
 * nothing.
 */
export function buildIdentity(row: Record<string, unknown>) {
  // A customer of Square can have a value that the checks refuse. It is compared as it is.
  const clean = (column: string, kind: TextKind): string =>
    cleanValue(row[column], kind).text ?? String(row[column]).trim();
  const name = `${clean("given_name", "text")} ${clean("family_name", "text")}`.trim();
  const digits = clean("phone_number", "phone").replace(/[^0-9]/g, "");
  return {
    name: (name || clean("company_name", "text")).replace(/\s+/g, " ").toLowerCase(),
    email_address: clean("email_address", "email").toLowerCase(),
    phone_number: digits.replace(/^0+/, ""),
    reference_id: clean("reference_id", "reference"),
  };
}

export type Identity = ReturnType<typeof buildIdentity>;

/**
 * True if name and email address both differ. Such rows are different people, for example a family
 * with one telephone. A blank value differs from nothing.
 */
export function isOtherPerson(one: Identity, other: Identity): boolean {
  const differs = (a: string, b: string): boolean => a !== "" && b !== "" && a !== b;
  return differs(one.name, other.name) && differs(one.email_address, other.email_address);
}
