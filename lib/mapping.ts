/** A customer as Square sends and takes it: Square's own names, values not yet trusted. */
export type Customer = Record<string, unknown>;

/** What a column of `customers` can hold. */
export type Value = string | number | null;

/** A row of `customers` as read from the file, by column name. */
export type Row = Record<string, unknown>;

interface Field {
  column: string;
  /** Where Square keeps it, such as `address.country`. */
  square: string;
  as: "text" | "time" | "integer" | "list" | "flag";
  /** Sent to Square when a row is pushed; everything else is Square's to say. */
  sent?: true;
  /** The longest text that Square takes, in characters (limits of BulkCreateCustomerData). */
  longest?: number;
  /** Puts case and spaces right, or answers undefined for what Square cannot take. Never guesses. */
  form?: (text: string) => string | undefined;
}

/**
 * The two data models side by side; this table is what you edit to carry another field.
 * Its order is the order of the values in a row. A test holds it to `schema.sql`.
 */
export const FIELDS: readonly Field[] = [
  { column: "id", square: "id", as: "text" },
  { column: "created_at", square: "created_at", as: "time" },
  { column: "updated_at", square: "updated_at", as: "time" },
  { column: "version", square: "version", as: "integer" },
  { column: "creation_source", square: "creation_source", as: "text" },
  { column: "given_name", square: "given_name", as: "text", sent: true, longest: 300 },
  { column: "family_name", square: "family_name", as: "text", sent: true, longest: 300 },
  { column: "company_name", square: "company_name", as: "text", sent: true, longest: 500 },
  { column: "nickname", square: "nickname", as: "text", sent: true, longest: 100 },
  {
    column: "email_address",
    square: "email_address",
    as: "text",
    sent: true,
    longest: 254,
    form: toEmail,
  },
  { column: "phone_number", square: "phone_number", as: "text", sent: true, form: toPhone },
  { column: "birthday", square: "birthday", as: "text", sent: true, form: toBirthday },
  { column: "note", square: "note", as: "text", sent: true },
  { column: "reference_id", square: "reference_id", as: "text", sent: true, longest: 100 },
  { column: "tax_ids_eu_vat", square: "tax_ids.eu_vat", as: "text", sent: true, longest: 20 },
  { column: "address_line_1", square: "address.address_line_1", as: "text", sent: true },
  { column: "address_line_2", square: "address.address_line_2", as: "text", sent: true },
  { column: "address_line_3", square: "address.address_line_3", as: "text", sent: true },
  { column: "locality", square: "address.locality", as: "text", sent: true },
  { column: "sublocality", square: "address.sublocality", as: "text", sent: true },
  {
    column: "administrative_district_level_1",
    square: "address.administrative_district_level_1",
    as: "text",
    sent: true,
  },
  { column: "postal_code", square: "address.postal_code", as: "text", sent: true },
  { column: "country", square: "address.country", as: "text", sent: true, form: toCountry },
  { column: "group_ids", square: "group_ids", as: "list" },
  { column: "segment_ids", square: "segment_ids", as: "list" },
  { column: "email_unsubscribed", square: "preferences.email_unsubscribed", as: "flag" },
];

/** Square refuses a profile that has none of these, and leaves such profiles out of every search. */
const ONE_OF = ["given_name", "family_name", "company_name", "email_address", "phone_number"];

/** One column's value out of what {@linkcode toValues} returns. */
export function columnValue(values: Value[], column: string): Value {
  return values[FIELDS.findIndex((field) => field.column === column)] ?? null;
}

/**
 * Turns a customer from Square into the values of a row, in the order of {@linkcode FIELDS}.
 * Nothing is dropped for being odd: an unknown enum value or a wrong type is kept as text.
 */
export function toValues(customer: Customer): Value[] {
  return FIELDS.map(({ square, as }) => {
    let value: unknown = customer;
    for (const name of square.split(".")) value = isRecord(value) ? value[name] : undefined;
    if (as === "flag") return value === true ? 1 : 0;
    if (as === "list") return toText(value ?? []);
    if (as === "integer") return Number.isSafeInteger(value) ? Number(value) : null;
    if (value === undefined || value === null) return null;
    return as === "time" ? toTime(toText(value)) : toText(value);
  });
}

/** Collects customers by id: of one that came twice the newer version stays. */
export function keepNewest(customers: Map<string, Value[]>, customer: Customer): void {
  const values = toValues(customer);
  const id = String(columnValue(values, "id"));
  const other = customers.get(id);
  const isOlder =
    other && Number(columnValue(values, "version")) < Number(columnValue(other, "version"));
  if (!isOlder) customers.set(id, values);
}

/**
 * Turns a local row into what CreateCustomer takes, or says why Square would refuse it.
 * Empty and blank columns are left out: Square takes an unset field, not an empty one.
 */
export function toCustomer(row: Row): { customer: Customer; problems: string[] } {
  const customer: Customer = {};
  const problems: string[] = [];
  for (const { column, square, sent, longest, form } of FIELDS) {
    const value = row[column];
    if (!sent || value === null || value === undefined) continue;
    const text = typeof value === "string" || typeof value === "number" ? String(value).trim() : "";
    if (text === "" && (typeof value === "string" || typeof value === "number")) continue;
    const right = form === undefined ? text : form(text);
    if (text === "") problems.push(`${column} is not a text`);
    else if (right === undefined) problems.push(`${column} is not in a form that Square takes`);
    else if (longest !== undefined && [...right].length > longest)
      problems.push(`${column} is longer than ${longest} characters`);
    else {
      const [parent, child] = square.split(".");
      if (parent === undefined) continue;
      if (child === undefined) customer[parent] = right;
      else customer[parent] = { ...toRecord(customer[parent]), [child]: right };
    }
  }
  if (problems.length === 0 && !ONE_OF.some((name) => name in customer))
    problems.push(`one of ${ONE_OF.join(", ")} is needed`);
  return { customer, problems };
}

/**
 * A time of Square's as UTC with exactly three digits, so that text order is time order.
 * Square drops trailing zeros, and as text `…44Z` comes after `…44.72Z`.
 */
export function toTime(text: string): string {
  const time = Date.parse(text);
  return Number.isNaN(time) ? text : new Date(time).toISOString();
}

/** An e-mail address to compare by: Square's search does not look at case either. */
export function toSameEmail(email: unknown): string | undefined {
  return typeof email === "string" && email.trim() !== "" ? email.trim().toLowerCase() : undefined;
}

/** A phone number's digits to compare by, without leading zeros; fewer than nine say too little. */
export function toSamePhone(phone: unknown): string | undefined {
  const digits = String(phone ?? "").replace(/\D|^\D*0+/g, "");
  return digits.length >= 9 ? digits : undefined;
}

/** True for a JSON object: not null, not an array. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function toRecord(value: unknown): Record<string, unknown> {
  return isRecord(value) ? value : {};
}

// SQLite's own functions end a text at its first NUL, and half a surrogate pair is not valid UTF-8.
function toText(value: unknown): string {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.replace(/\0|\p{Surrogate}/gu, "\uFFFD");
}

function toEmail(text: string): string | undefined {
  return /^[^\s@]+@[^\s@.]+(\.[^\s@.]+)+$/.test(text) ? text : undefined;
}

// Square takes 9 to 16 digits with an optional + (and enforces that since October 2022).
function toPhone(text: string): string | undefined {
  const phone = text.replace(/[\s().-]/g, "");
  return /^\+?\d{9,16}$/.test(phone) ? phone : undefined;
}

// Square takes YYYY-MM-DD and MM-DD; it answers year 0000 where the year is not known.
function toBirthday(text: string): string | undefined {
  const [, year = "0000", day] = /^(?:(\d{4})-)?(\d{2}-\d{2})$/.exec(text) ?? [];
  // 2000 was a leap year: without a year, 29 February is a birthday like any other.
  const date = new Date(`${year === "0000" ? "2000" : year}-${day}T00:00:00Z`);
  if (Number.isNaN(date.getTime()) || date.toISOString().slice(5, 10) !== day) return undefined;
  return year === "0000" ? day : `${year}-${day}`;
}

function toCountry(text: string): string | undefined {
  const code = text.toUpperCase();
  const names = new Intl.DisplayNames(["en"], { type: "region", fallback: "none" });
  return /^[A-Z]{2}$/.test(code) && names.of(code) !== undefined ? code : undefined;
}
